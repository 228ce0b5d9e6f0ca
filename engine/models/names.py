"""Families that several modules tell apart by their Hugging Face `model_type`."""

from __future__ import annotations

# Most of whose layers are gated delta nets, and whose attention is gated.
QWEN35, QWEN35_MOE, QWEN3_NEXT = DELTA = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
# Most of whose layers are short convolutions.
LFM2, LFM2_MOE = CONV = ("lfm2", "lfm2_moe")
# Of which every layer has sinks, and experts with OpenAI's gates.
GPT_OSS = "gpt_oss"
