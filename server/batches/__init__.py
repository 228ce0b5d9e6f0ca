"""Files and batches: OpenAI's batch API on a durable queue."""
