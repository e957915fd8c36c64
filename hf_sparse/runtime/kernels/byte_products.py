"""Products of codes with features in eight bits, summed by fours: what targets have for it.

Sums of 16 bits never saturate: a code of 8 bits is in -127 .. 127, and so is a feature, so that two
products are at most 2 * 127 * 127 = 32258; a code of 4 bits is stored as 0 .. 15, and eight times two
products are at most 8 * 2 * 15 * 127 = 30480.

    VNNI        u8 * s8, four at a time, into 32 bits. Dense codes become u8 by 128 (4 bits have 8 on
                them), which is undone by the sum of the features. Of sparse codes of 8 bits, the
                features are u8 in place of them; what that adds is summed beside.
    SSSE3/AVX2  the same by two instructions, with a sum of 16 bits in between. One factor of 8 bits
                loses its sign to the other.
    ARM         s8 * s8, with dot products or without
"""

from __future__ import annotations

from collections.abc import Callable

from hf_sparse.runtime.kernels.code_formats import BESIDE, CodeFormat
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target
from hf_sparse.runtime.llvm.values import Value, vector

# The features of a unit as bytes: as they are (0), or of the part of the records that begins at BESIDE.
Features = Callable[[int], Value]
# Sums of pairs that fit into 16 bits, of codes of 4 bits.
_PAIRS = 8


class ByteProducts:
    """Sums of one vector of rows, over the columns of a scale."""

    def __init__(self, f: Function, target: Target, form: CodeFormat) -> None:
        self.f, self.has, self.form, self.lanes = f, target.has, form, target.lanes
        self.bytes, self.words = vector(4 * self.lanes, "i8"), vector(2 * self.lanes, "i16")
        self.sums = vector(self.lanes, "i32")
        # Two chains, so that a sum does not wait for the one before it.
        self._chains: list[Value | None] = [None, None]
        self._turn = 0

    def add(self, codes: Value, features: Features) -> None:
        """Add the products of a unit: codes as they are stored, in bytes."""
        raise NotImplementedError

    def total(self, of_features: Value) -> Value:
        """The sums, as i32. `of_features`: the sum of the features of all units, an i32."""
        raise NotImplementedError

    def _sum(self, *, chains: list[Value | None] | None = None) -> Value:
        first, second = self._chains if chains is None else chains
        assert first is not None
        return first if second is None else first + second

    def _offset(self, of_features: Value) -> Value:
        """What the stored codes are more than those that are meant, times the features."""
        offset = of_features * (128 if self.form.bits == 8 else 8)
        return offset.splat(self.lanes)

    def _splat(self, byte: int) -> Value:
        return self.f.constant(byte, self.bytes)


class UnsignedDots(ByteProducts):
    """With VNNI."""

    def __init__(self, f: Function, target: Target, form: CodeFormat) -> None:
        super().__init__(f, target, form)
        self._more: list[Value | None] = [None, None]

    def add(self, codes: Value, features: Features) -> None:
        eight = self.form.bits == 8
        if self.form.in_order:
            self._dot(self._chains, codes ^ self._splat(-128) if eight else codes, features(0))
        elif eight:
            self._dot(self._chains, features(BESIDE), codes)
            self._dot(self._more, self._splat(-128), codes)
        else:
            self._dot(self._chains, codes, features(0))
            self._dot(self._more, self._splat(8), features(0))
        self._turn ^= 1

    def _dot(self, chains: list[Value | None], unsigned: Value, signed: Value) -> None:
        before = chains[self._turn]
        before = self.f.constant(0, self.sums) if before is None else before
        words = [one.cast("bitcast", self.sums) for one in (unsigned, signed)]
        chains[self._turn] = self.f.call(self.sums, self.has.unsigned_dot, before, *words)

    def total(self, of_features: Value) -> Value:
        if self.form.in_order:
            return self._sum() - self._offset(of_features)
        return self._sum() - self._sum(chains=self._more)


class PairProducts(ByteProducts):
    """With `pmaddubsw` and `pmaddwd`."""

    def __init__(self, f: Function, target: Target, form: CodeFormat) -> None:
        super().__init__(f, target, form)
        self._pairs: Value | None = None
        self._more: Value | None = None
        self._count = 0

    def add(self, codes: Value, features: Features) -> None:
        if self.form.bits == 4:
            self._pairs = self._added(self._pairs, self._product(codes, features(0)))
            if not self.form.in_order:
                more = self._product(self._splat(8), features(0))
                self._more = self._added(self._more, more)
            self._count += 1
            if self._count == _PAIRS:
                self._flush()
            return
        if self.form.in_order:
            signed = self.f.call(self.bytes, self.has.signed_as, codes, features(0))
            self._widen(self._product(features(BESIDE), signed))
        else:
            signed = self.f.call(self.bytes, self.has.signed_as, features(0), codes)
            size = self.f.call(
                self.bytes, f"llvm.abs.v{4 * self.lanes}i8", codes, self.f.constant(0, "i1")
            )
            self._widen(self._product(size, signed))

    def _product(self, unsigned: Value, signed: Value) -> Value:
        return self.f.call(self.words, self.has.pair_products, unsigned, signed)

    @staticmethod
    def _added(before: Value | None, one: Value) -> Value:
        return one if before is None else before + one

    def _widen(self, pairs: Value) -> None:
        ones = self.f.constant(1, self.words)
        fours = self.f.call(self.sums, self.has.pair_sums, pairs, ones)
        self._chains[self._turn] = self._added(self._chains[self._turn], fours)
        self._turn ^= 1

    def _flush(self) -> None:
        if self._pairs is not None:
            self._widen(self._pairs if self._more is None else self._pairs - self._more)
        self._pairs, self._more, self._count = None, None, 0

    def total(self, of_features: Value) -> Value:
        self._flush()
        if self.form.in_order and self.form.bits == 4:
            return self._sum() - self._offset(of_features)
        return self._sum()


class SignedProducts(ByteProducts):
    """On ARM: nothing needs a correction."""

    def add(self, codes: Value, features: Features) -> None:
        if self.form.bits == 4:
            codes = codes - self._splat(8)
        before = self._chains[self._turn]
        if self.has.signed_dot:
            before = self.f.constant(0, self.sums) if before is None else before
            found = self.f.call(self.sums, self.has.signed_dot, before, codes, features(0))
        else:
            found = self._fours(codes, features(0))
            found = found if before is None else before + found
        self._chains[self._turn] = found
        self._turn ^= 1

    def _fours(self, a: Value, b: Value) -> Value:
        """Sums of four products of bytes."""
        f, halves = self.f, []
        for first in (0, 8):
            parts = [f.part(one, first, 8) for one in (a, b)]
            product = f.call(vector(8, "i16"), self.has.long_product, *parts)
            halves.append(f.call(self.sums, self.has.long_pairs, product))
        return f.call(self.sums, self.has.add_pairs, *halves)

    def total(self, of_features: Value) -> Value:
        return self._sum()


def byte_products(f: Function, target: Target, form: CodeFormat) -> ByteProducts:
    """What a target has for codes of a format."""
    if target.has.unsigned_dot:
        return UnsignedDots(f, target, form)
    if target.has.pair_products:
        return PairProducts(f, target, form)
    return SignedProducts(f, target, form)


def beside(f: Function, target: Target, features: Value) -> Value:
    """What records of features have beside them, from bytes: `q + 128`, or `|q|`."""
    if target.has.unsigned_dot:
        return features ^ f.constant(-128, features.kind)
    name = f"llvm.abs.v{features.kind.split()[0][1:]}i8"
    return f.call(features.kind, name, features, f.constant(0, "i1"))
