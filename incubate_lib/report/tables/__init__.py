"""Records as tables: comparison, statistics, studies, Modular Adaptive Training, and figures of them."""
