"""Tables, figures, the HTML report: reads what training wrote, never trains."""
