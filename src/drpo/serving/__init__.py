"""Answers from a trained model: text while it is sampled, conversations, and an HTTP server with OpenAI's API."""
