"""The GPU of the stand-in."""

import types

current_platform = types.SimpleNamespace(get_device_name=lambda: "Fake GPU")
