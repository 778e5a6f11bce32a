"""Names of the arithmetics on offer; what they are and which of them run here is `inference.precision`."""

PRECISIONS = ("fp32", "fp32_packed", "bf16", "bf16_packed", "fp16_packed", "packed_by_rows", "fp16")
