"""The architecture: TransNormerLLM, its ablations, and a Llama baseline in the same decoder."""
