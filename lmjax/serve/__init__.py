"""Models put to use by others: continuous batching, an HTTP endpoint like OpenAI's, and a chat in the terminal."""
