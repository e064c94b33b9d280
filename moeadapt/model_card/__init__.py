"""The text of a model card: Markdown, the owner's part and ours, templates nobody filled in.

Knows neither models nor trainers nor the hub, so that saving, training and pushing share it.
"""
