"""Events as Stripe and RevenueCat send them, in the shapes that their documentation shows."""

from __future__ import annotations

import itertools
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from actors import Service, User

# The first of the month that has begun, so that periods before it are over and it is not.
NOW = datetime.now(UTC).replace(microsecond=0)
MONTH = timedelta(days=30)
START = NOW - timedelta(days=10)
BASIL = "2025-03-31.basil"
CLASSIC = "2024-06-20"

_numbers = itertools.count(1)


def seconds(time: datetime) -> int:
    return int(time.timestamp())


def millis(time: datetime) -> int:
    return int(time.timestamp() * 1000)


class Stripe:
    """A Stripe account with one customer, whose events name the user or do not."""

    provider = "stripe"

    def __init__(self, user: User | str | None, version: str = BASIL, **names: str) -> None:
        number = next(_numbers)
        user_id = getattr(user, "id", user)
        self.metadata = {"user_id": user_id} if user_id else {}
        self.version, self.customer = version, f"cus_{number}"
        self.subscription, self.price = f"sub_{number}", "price_monthly"
        self.__dict__.update(names)

    def event(self, type: str, of: dict[str, Any], at: datetime = NOW, **rest: Any) -> dict:
        return {
            "id": f"evt_{uuid.uuid4().hex}",
            "object": "event",
            "api_version": self.version,
            "created": seconds(at),
            "livemode": True,
            "pending_webhooks": 1,
            "type": type,
            "data": {"object": of},
        } | rest

    def line(
        self, start: datetime, amount: int = 1000, is_proration: bool = False, **rest: Any
    ) -> dict[str, Any]:
        """One line of an invoice: a period of the subscription."""
        price = rest.pop("price", self.price)
        line = {
            "id": f"il_{next(_numbers)}",
            "object": "line_item",
            "amount": amount,
            "currency": "usd",
            "metadata": self.metadata,
            "quantity": 1,
            "period": {"start": seconds(start), "end": seconds(start + MONTH)},
        }
        if self.version == BASIL:
            line["parent"] = {
                "type": "subscription_item_details",
                "invoice_item_details": None,
                "subscription_item_details": {
                    "subscription": self.subscription,
                    "subscription_item": "si_1",
                    "invoice_item": None,
                    "proration": is_proration,
                },
            }
            line["pricing"] = {
                "type": "price_details",
                "price_details": {"price": price, "product": "prod_1"},
            }
        else:
            line |= {
                "type": "subscription",
                "subscription": self.subscription,
                "proration": is_proration,
                "price": {"id": price, "product": "prod_1"},
            }
        return line | rest

    def invoice(self, *lines: dict[str, Any], reason: str = "subscription_cycle", **rest: Any):
        """A paid invoice of these lines; it names its payment where that is of the time."""
        number = next(_numbers)
        invoice = {
            "id": f"in_{number}",
            "object": "invoice",
            "status": "paid",
            "billing_reason": reason,
            "customer": self.customer,
            "amount_paid": sum(line["amount"] for line in lines),
            "lines": {"object": "list", "has_more": False, "data": list(lines)},
        }
        if self.version == BASIL:
            details = {"subscription": self.subscription, "metadata": self.metadata}
            invoice["parent"] = {
                "type": "subscription_details",
                "subscription_details": details,
                "quote_details": None,
            }
        else:
            invoice |= {
                "subscription": self.subscription,
                "subscription_details": {"metadata": self.metadata},
                "charge": f"ch_{number}",
                "payment_intent": f"pi_{number}",
            }
        return invoice | rest

    def paid(self, start: datetime = START, at: datetime | None = None, **rest: Any) -> dict:
        """A period of the subscription was paid for."""
        return self.event("invoice.paid", self.invoice(self.line(start), **rest), at or start)

    @staticmethod
    def intent(paid: dict[str, Any]) -> str:
        """The payment of an invoice or a session."""
        of = paid["data"]["object"]
        return of.get("payment_intent") or of["id"].replace("in_", "pi_")

    def invoice_payment(self, paid: dict[str, Any]) -> dict:
        """By what an invoice was paid, which since basil it does not say itself."""
        payment = {"type": "payment_intent", "payment_intent": self.intent(paid)}
        invoice = {"object": "invoice_payment", "invoice": paid["data"]["object"]["id"]}
        of = invoice | {"status": "paid", "payment": payment}
        return self.event("invoice_payment.paid", of, datetime.fromtimestamp(paid["created"], UTC))

    def checkout(self, at: datetime = NOW, type: str = "completed", **changes: Any) -> dict:
        """A session in which something was bought once."""
        number = next(_numbers)
        session = {
            "id": f"cs_{number}",
            "object": "checkout.session",
            "mode": "payment",
            "payment_status": "paid",
            "amount_total": 500,
            "client_reference_id": self.metadata.get("user_id"),
            "customer": None,
            "invoice": None,
            "subscription": None,
            "payment_intent": f"pi_{number}",
            "payment_link": None,
            "metadata": {"product": "pack"},
        }
        return self.event(f"checkout.session.{type}", session | changes, at)

    def subscribed(self, end: datetime, at: datetime, status: str = "active", **rest: Any) -> dict:
        """The subscription has changed: it is so now, until then."""
        period = {
            "current_period_start": seconds(end - MONTH),
            "current_period_end": seconds(end),
        }
        item = {"id": "si_1", "price": {"id": self.price, "product": "prod_1"}, "quantity": 1}
        of = {
            "id": self.subscription,
            "object": "subscription",
            "customer": self.customer,
            "status": status,
            "metadata": self.metadata,
            "ended_at": seconds(at) if status == "canceled" else None,
            "items": {"data": [item | (period if self.version == BASIL else {})]},
        } | ({} if self.version == BASIL else period)
        what = "deleted" if status == "canceled" else "updated"
        return self.event(f"customer.subscription.{what}", of | rest, at)

    def refunded(self, intent: str, amount: int, of: int, at: datetime = NOW) -> dict:
        """So much of a charge has been given back by now."""
        charge = {"id": intent.replace("pi_", "ch_"), "object": "charge", "amount": of}
        charge |= {"amount_refunded": amount, "payment_intent": intent, "customer": self.customer}
        return self.event("charge.refunded", charge | {"metadata": {}}, at)

    def disputed(
        self, intent: str, amount: int, status: str, at: datetime = NOW, what: str = "created"
    ) -> dict:
        dispute = {"id": f"dp_{intent}", "object": "dispute", "amount": amount, "status": status}
        dispute |= {"charge": intent.replace("pi_", "ch_"), "payment_intent": intent}
        return self.event(f"charge.dispute.{what}", dispute | {"metadata": {}}, at)


class RevenueCat:
    """An app's store behind RevenueCat, and one who buys there."""

    provider = "revenuecat"

    def __init__(self, user: User | str, **names: Any) -> None:
        number = next(_numbers)
        self.user_id, self.original = getattr(user, "id", user), f"1000{number}"
        self.aliases = [f"$RCAnonymousID:{number}"]
        self.__dict__.update(names)

    def event(self, type: str, at: datetime = NOW, **rest: Any) -> dict:
        event = {
            "id": str(uuid.uuid4()).upper(),
            "type": type,
            "event_timestamp_ms": millis(at),
            "environment": "PRODUCTION",
            "store": "APP_STORE",
        }
        return {"api_version": "1.0", "event": event | rest}

    def about(self, type: str, start: datetime = START, at: datetime | None = None, **rest: Any):
        """An event of the subscription, whose period began then."""
        of = {
            "app_user_id": self.user_id,
            "original_app_user_id": self.aliases[0] if self.aliases else self.user_id,
            "aliases": self.aliases,
            "product_id": "monthly",
            "period_type": "NORMAL",
            "purchased_at_ms": millis(start),
            "expiration_at_ms": millis(start + MONTH),
            "transaction_id": f"{self.original}-{seconds(start)}",
            "original_transaction_id": self.original,
            "is_family_share": False,
            "price": 9.99,
            "currency": "USD",
        }
        return self.event(type, at or start, **of | rest)

    def renewed(self, start: datetime = START, at: datetime | None = None, **rest: Any) -> dict:
        return self.about("RENEWAL", start, at, **rest)

    def bought(self, at: datetime = NOW, **rest: Any) -> dict:
        number = str(next(_numbers))
        ids = {"transaction_id": number, "original_transaction_id": number}
        of = {"product_id": "pack", "expiration_at_ms": None} | ids
        return self.about("NON_RENEWING_PURCHASE", at, at, **of | rest)

    def refunded(self, of: dict[str, Any], at: datetime = NOW, **rest: Any) -> dict:
        """What this event told of was refunded."""
        same = of["event"] | {"id": str(uuid.uuid4()), "type": "CANCELLATION"}
        refund = {"cancel_reason": "CUSTOMER_SUPPORT", "event_timestamp_ms": millis(at)}
        return {"api_version": "1.0", "event": same | refund | rest}


PRODUCTS = """
insert into public.credit_products (
  provider, product_id, credits, makes_paid, rollover_cap, grace, trial_credits
)
select p.name, product, credits, makes_paid, cap, '1 day', 5
from private.billing_providers as p cross join (values
  ('price_monthly', 100, true, 0), ('monthly', 100, true, 0),
  ('price_rolling', 100, true, 60), ('rolling', 100, true, 60), ('pack', 50, false, 0),
  ('lifetime', 0, true, 0)
) as x (product, credits, makes_paid, cap)
"""


def apply(service: Service, seller: Stripe | RevenueCat, *events: dict[str, Any]) -> list[str]:
    """Apply events one after the other; return what became of each."""
    return [service.apply_billing_event(seller.provider, event)["outcome"] for event in events]
