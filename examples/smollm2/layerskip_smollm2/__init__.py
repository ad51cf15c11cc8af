"""SmolLM2-135M-Instruct as a LayerSkip model, by task: the weights, adapters, draft heads, tasks and the demo.

The library finds them by name, see `layerskip.registry`; the recipes that trained the adapters are beside this package.
"""
