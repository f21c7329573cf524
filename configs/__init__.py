"""Recipes as YAML files, shipped as package data."""
