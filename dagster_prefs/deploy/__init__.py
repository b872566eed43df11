"""Deployment of the declared models: the plan, and its application."""
