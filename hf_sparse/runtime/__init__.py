"""The sparse compiler: weights with zeros become machine code for this CPU, through LLVM."""
