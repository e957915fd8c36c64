"""Publishing and pulling with the real client, against a stand-in for the Hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exporting import needs_export
from tests.support.hub_stand_in import HubStandIn

SCRIPT = """
import sys
from pathlib import Path
import huggingface_hub, torch, transformers, hf_sparse
from tests.support.tiny_models import tiny_model, tiny_tokenizer

model = tiny_model("llama")
model.config.name_or_path = "someone/tiny-llama"
config = hf_sparse.SparsityConfig("2:4")
report = hf_sparse.prune_(model, config, "magnitude")
metrics = [hf_sparse.Metric("perplexity, prose", 12.5, 11.25)]
hf_sparse.push_to_hub(model, "user/tiny-sparse", config, tokenizer=tiny_tokenizer(),
                      report=report, metrics=metrics, tags=["tiny"], max_shard_size="20KB",
                      onnx=True)
from transformers.exporters.base import ExportedModel
exported = ExportedModel.from_pretrained("user/tiny-sparse", subfolder="onnx")
assert exported.config.model_type == "llama"

pulled = transformers.AutoModelForCausalLM.from_pretrained("user/tiny-sparse")
assert type(pulled).__name__ == "SparseLlamaForCausalLM", type(pulled)
for name, value in model.state_dict().items():
    assert torch.equal(value, pulled.state_dict()[name]), name
tokenizer = transformers.AutoTokenizer.from_pretrained("user/tiny-sparse")
assert tokenizer("prose")["input_ids"] == tiny_tokenizer()("prose")["input_ids"]

pulled.push_to_hub("user/tiny-sparse", commit_message="One file", tokenizer=tokenizer)
pulled.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="user/other")
from hf_sparse.cli import main
assert main(["push", sys.argv[1], "user/third", "--json"]) == 0
assert main(["push", sys.argv[1], "user/graph", "--onnx", "--json"]) == 0
assert main(["push", sys.argv[1], "user/graph", "--onnx", "--json"]) == 0
graph = huggingface_hub.HfApi().list_repo_files("user/graph")
again = transformers.AutoModelForCausalLM.from_pretrained("user/third")
assert torch.equal(again.model.norm.weight, model.model.norm.weight)
import peft
adapted = hf_sparse.get_peft_model(pulled, peft.LoraConfig(r=2, init_lora_weights=False))
hf_sparse.push_to_hub(adapted, "user/recovered", config)
merged = transformers.AutoModelForCausalLM.from_pretrained("user/recovered")
ids = torch.arange(2, 9)[None]
assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
assert hf_sparse.measure_sparsity(merged).zeros == hf_sparse.measure_sparsity(model).zeros

hf_sparse.save_pretrained(merged, sys.argv[1] + "-base", config, tokenizer=tiny_tokenizer())
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-base")
adapted = hf_sparse.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
adapter = sys.argv[1] + "-adapter"
adapted.save_pretrained(adapter)
assert main(["push", adapter, "user/pushed", "--json"]) == 0
merged = transformers.AutoModelForCausalLM.from_pretrained("user/pushed")
assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
assert hf_sparse.measure_sparsity(merged).zeros == hf_sparse.measure_sparsity(model).zeros
assert len(transformers.AutoTokenizer.from_pretrained("user/pushed")) == 256

other = tiny_model("llama", seed=3)
hf_sparse.prune_(other, config, "magnitude")
hf_sparse.save_pretrained(other, sys.argv[1] + "-other", config)
assert main(["push", adapter, "user/never", "--base", sys.argv[1] + "-other"]) == 1
assert main(["push", sys.argv[1], "user/never", "--base", sys.argv[1]]) == 1
Path(sys.argv[1] + "-base").rename(sys.argv[1] + "-moved")
assert main(["push", adapter, "user/never"]) == 1
assert main(["push", adapter, "user/moved", "--base", sys.argv[1] + "-moved"]) == 0

assert {"onnx/model.onnx", "onnx/export.json", "onnx/config.json"} <= set(graph)
api = huggingface_hub.HfApi()
api.upload_file(path_or_fileobj=b"mine", path_in_repo="onnx/mine.txt", repo_id="user/graph")
assert main(["push", sys.argv[1] + "-other", "user/graph"]) == 0
foreign = ("export.json", "model.onnx", "README.md")
for name in foreign:
    api.upload_file(path_or_fileobj=b"{}", path_in_repo=f"onnx/{name}", repo_id="user/moved")
hf_sparse.push_to_hub(other, "user/moved", config)
print("PULLED")
"""


@needs_export
def test_push_and_pull(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with HubStandIn() as hub:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "saved")],
            capture_output=True,
            text=True,
            env=hub.environment(tmp_path / "home"),
            cwd=Path(__file__).parents[2],
        )
        assert done.stdout.endswith("PULLED\n"), done.stdout + done.stderr
        for message in ("at other places", "--base is for adapters", "cannot be loaded from"):
            assert message in done.stderr, done.stderr
        assert "user/never" not in hub.repos
        assert "adapter_config.json" not in hub.files("user/moved")
        files = hub.files("user/tiny-sparse")
        first = hub.repos["user/tiny-sparse"][1].files
        assert "One file" in hub.commits("user/tiny-sparse")
        others = [set(hub.files(name)) for name in ("user/other", "user/third")]
        with_graph = hub.repos["user/graph"][1].files
        without_graph = hub.files("user/graph")
        foreign = hub.files("user/moved")
        names = ("user/other", "user/third", "user/recovered")
        *cards, recovered = [hub.files(name)["README.md"] for name in names]
    weights = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_hf_sparse.py",
    }
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    given = {".gitattributes", "README.md"}
    graph = {"config.json", "export.json", "generation_config.json", "README.md"}
    graph |= {"model.onnx", "model.onnx.data"} | tokenizer
    assert {name for name in first if "/" in name} == {f"onnx/{name}" for name in graph}
    # A graph that is not uploaded anew goes; files that are not of hf_sparse stay.
    assert set(files) == weights | tokenizer | given
    assert all(other == weights | given for other in others)
    onnx = {f"onnx/{name}" for name in graph - tokenizer}
    assert set(with_graph) == weights | given | onnx
    assert b"base_model: someone/tiny-llama" in with_graph["onnx/README.md"].content
    assert {name for name in without_graph if "onnx" in name} == {"onnx/mine.txt"}
    assert {"onnx/export.json", "onnx/model.onnx", "onnx/README.md"} <= set(foreign)
    assert not (tmp_path / "saved" / "onnx").exists()
    # What was pulled knows where it comes from, and tells it wherever it is pushed.
    for text in (b"base_model: someone/tiny-llama", b"| method | magnitude |", b"| 11.25 | 12.5 |"):
        assert all(text in card for card in (files["README.md"], *cards))
    assert b"- tiny\n" in cards[0]
    assert b"| method | magnitude |" in recovered
    assert b"| method | merged adapter |" in recovered
    assert b"None were measured." in recovered  # the figures are those of the model before
    assert b"| perplexity, prose, after this step | 12.5 (dense 11.25) |" in recovered
