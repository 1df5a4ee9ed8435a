"""What a person sees: terminal, TensorBoard, plots, `result.json`, `report.md`. clu is imported in
this package only.
"""
