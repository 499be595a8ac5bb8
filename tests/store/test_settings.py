"""What a collection remembers survives JSON."""

import json

from mmrag.store.settings import CollectionSettings, refuse_other


def test_settings_survive_json():
    settings = CollectionSettings("m", "f", 8, ("text", "fused"), {"dpi": 99, "ocr": True}, "none")
    again = CollectionSettings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings
    refuse_other(settings, again, "it")
