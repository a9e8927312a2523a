"""One file a patch. Each defines PATCH; the registry finds it by its file name, `patch_<id>.py`."""
