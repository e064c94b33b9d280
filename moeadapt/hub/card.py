"""README.md of a push: the one on the hub, or else that of the folder, with our part."""

from typing import Any

from moeadapt.adapter_format.files import exists, read_small
from moeadapt.errors import ConfigError
from moeadapt.hub import adapter_card, checkpoint_card
from moeadapt.hub.names import check_license
from moeadapt.hub.parcel import CARD, MAX_TEXT_BYTES, Parcel
from moeadapt.hub.private import check_private
from moeadapt.model_card.merge import make_card, own_text, read_card

CARDS = {"adapter": adapter_card, "checkpoint": checkpoint_card}
"""Kind of a parcel -> what writes its card."""


def card_of(
    parcel: Parcel,
    repo_id: str,
    revision: str | None,
    license: str | None,
    there: str | None,
    *,
    from_model: bool,
    token: str | None,
) -> str:
    """Return the text of README.md; its owner's text stays.

    Args:
        parcel: what is sent; a card of the folder that is not sent is noted there.
        repo_id: owner/name.
        revision: the branch, which our part pins; None: main.
        license: an identifier of the hub; None: that of the card.
        there: the card on the hub; None: there is none.
        from_model: whether the folder is a scratch folder, whose card nobody wrote.
        token: the one that is used to push; None: there is none.

    Raises:
        ConfigError: the licence is unknown or contradicts the card, or the card is broken or holds
            a token or a path of this machine.
    """
    where, old = f"README.md of {repo_id}", there
    if old is None and not from_model and exists(parcel.folder, CARD):
        where = str(parcel.folder / CARD)
        old = _local_card(parcel, where, token)
    elif not from_model and exists(parcel.folder, CARD):
        mine = read_small(parcel.folder, CARD, MAX_TEXT_BYTES).decode("utf-8", "replace")
        if own_text(mine).strip() not in (old or ""):
            parcel.left_out[CARD] = "the repository has one, and its text is kept"
    theirs = read_card(old, where).data.to_dict()
    kind = CARDS[parcel.kind]
    fields = kind.front_matter(parcel, parcel.facts["datasets"])
    fields["license"] = _license(license, theirs, where)
    part = kind.our_part(parcel, repo_id, revision)
    check_private(f"our part of {CARD}", f"{part}\n{fields}".encode(), token)
    return make_card(fields, part, old, where)


def _license(license: str | None, theirs: dict[str, Any], where: str) -> str | None:
    """Return the licence that was said; None: the card has one."""
    named = license or theirs.get("license")
    check_license(named if isinstance(named, str) or not named else "", theirs)
    if license and theirs.get("license") not in (None, license):
        raise ConfigError(
            f"{where} says license {theirs['license']!r}, and you say {license!r}; change it "
            "there, or leave yours out"
        )
    return license or None


def _local_card(parcel: Parcel, where: str, token: str | None) -> str:
    """Return the card of the folder, its base named by its id; nothing private in what is kept."""
    content = parcel.with_id(read_small(parcel.folder, CARD, MAX_TEXT_BYTES))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    front = read_card(text, where).data.to_dict()
    front.pop("base_model", None)  # ours stands there
    check_private(where, f"{own_text(text)}\n{front}".encode(), token)
    return text
