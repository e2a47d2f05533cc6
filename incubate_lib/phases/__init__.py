"""Kinds of phase: the networks that they train, how one is run, weights from elsewhere, what a step costs here."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)  # other packages may have members, see config.members
