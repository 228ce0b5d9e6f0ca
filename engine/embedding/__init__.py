"""Texts to vectors: encoder models, served beside a chat model."""
