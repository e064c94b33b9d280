"""Publishing to a hub: everything is checked here, then one commit is sent.

    folder or model -> adapter.adapter_parcel | checkpoint.checkpoint_parcel    what would be sent
                    -> card                    README.md: our part, the user's own text kept
                    -> private.check_private   no token, no path of this machine in any file
                    -> client.Remote.commit    one commit; nothing was sent before

Weights are read as everywhere else: safetensors alone, compared with their manifest or receipt.
"""
