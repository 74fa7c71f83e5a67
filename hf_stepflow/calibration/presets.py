"""The module in which repositories exported by 0.1.0 look up presets by name."""

from hf_stepflow.presets.preset import load_preset as load_preset
from hf_stepflow.presets.preset import preset_for as preset_for
