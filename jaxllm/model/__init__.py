"""The model, written once: it knows logical axis names and no places."""
