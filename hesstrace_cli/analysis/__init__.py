"""A model or checkpoint looked at: loaded, evaluated, traced, its spectrum, its derivatives."""
