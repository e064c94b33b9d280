"""Publishing to a hub: everything is checked here, then one commit is sent.

    folder or model -> adapter.adapter_parcel | checkpoint.checkpoint_parcel    what would be sent
                    -> card.card_of            README.md: our part, the user's own text kept
                    -> private.check_private   no token, no path of this machine in any file
                    -> client.Remote.commit    one commit; nothing was sent before

Weights are read as everywhere else: safetensors alone, and no tensor may hold NaN. Those of an
adapter are compared with its manifest, byte for byte; of a checkpoint the receipt knows the size.
"""
