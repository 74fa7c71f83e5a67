"""The app: one page on which a model answers with and without StepFlow, for those who look first.

`layout` makes the page with gradio, which is imported there alone and inside functions. What the page shows comes from
functions that need no gradio: `model` (what is loaded, and the settings that the controls give), `answers` (answers
as they are written), `comparison` (both on more problems, while they run) and `panels` (HTML). `space` writes the
app as a Hugging Face Space.
"""

from .layout import launch_app, make_app
from .model import LoadedModel, load_model

__all__ = ["LoadedModel", "launch_app", "load_model", "make_app"]
