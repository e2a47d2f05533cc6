"""The graph of phases, and where its notebooks run."""
