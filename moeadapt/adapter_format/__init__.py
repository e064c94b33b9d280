"""What a saved adapter is on disk, and the strict reading of it; knows neither peft nor models.

    folder -> files.open_file      one open handle per file: regular, inside the folder, bounded
           -> settings.parse       adapter_config.json: plain data of a closed set of fields
           -> header.read_header   adapter_model.safetensors: names, types, shapes, offsets
           -> match.check_tensors  the header against what settings and base need
           -> adapter.AdapterFiles.read   the numbers: sha256, NaN; nothing was allocated before
           -> fingerprint          whether this is the base the adapter was trained on

The command line reads settings without torch, so import from the modules themselves.

`moeadapt_manifest.json` is written beside the adapter and holds the version of this format, the
sha256 of each file and the fingerprint of the base; see `manifest`.
"""
