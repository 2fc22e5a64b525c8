"""Evaluators: functions of (params, data) that give named numbers; masked sums, divided once."""
