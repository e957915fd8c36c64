"""Machine code: writing LLVM IR, compiling it for this CPU, and keeping it."""
