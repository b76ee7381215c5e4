"""Talking with a trained model: text as it is sampled, conversations, and an HTTP server that speaks OpenAI's API."""
