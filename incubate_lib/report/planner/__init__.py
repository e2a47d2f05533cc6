"""What training would cost: forecasts, their tables and charts, and what the bench measured."""
