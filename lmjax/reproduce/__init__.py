"""Experiments that end in a table and a figure, each made by one command: `lmjax reproduce NAME`."""
