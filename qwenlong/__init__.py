"""The QwenLong-L1.5 recipe (arXiv 2512.12967), thin, on top of qlkernels."""
