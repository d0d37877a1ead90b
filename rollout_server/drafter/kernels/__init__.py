"""Matrix multiplications with quantized weights: one file per scheme, and a factory.

``base.py`` says what each offers; ``factory.py`` picks by scheme, device and shape.
"""
