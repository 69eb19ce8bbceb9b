"""The demonstration of ``tardkd demo``: three short trainings on the built-in scenes, compared."""
