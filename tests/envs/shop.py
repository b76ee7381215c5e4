"""Classes as users of TRL write them for `environment_factory`."""

from typing import Any


class Shop:
    """Coins to spend."""

    def reset(self, **row: Any) -> str:
        self.row, self.coins, self.bought = row, 3, []
        return f"\nYou have {self.coins} coins."

    def buy(self, what: str, coins: int = 1) -> str:
        """Buy a thing.

        Args:
            what: the thing.
            coins: its price.
        """
        if coins > self.coins:
            raise ValueError(f"you have {self.coins} coins")
        self.coins -= coins
        self.bought.append(what)
        return f"You bought {what}."

    async def look(self) -> dict[str, int]:
        """Look into the purse."""
        return {"coins": self.coins}

    def _count(self) -> int:
        return len(self.bought)

    def get_reward(self) -> float:
        return float(self._count())


class Unpaid:
    """It leaves rewards to the rows' task, and says nothing."""

    def reset(self, **row: Any) -> None:
        self.row = row

    def look(self) -> list[str]:
        """Name the fields of the row."""
        return sorted(self.row)


class NoTool:
    def reset(self, **row: Any) -> None:
        pass


class Undocumented(NoTool):
    def buy(self, what: str) -> str:
        return what


class Broken(Shop):
    def __init__(self) -> None:
        raise OSError("the shop\nis closed")
