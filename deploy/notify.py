#!/usr/bin/env python3
"""Create a Prefect automation that sends every failed or crashed run to a webhook (Slack, Mattermost or another).

VITPRUNE_WEBHOOK is the address of the webhook, stored encrypted in Prefect's database; PREFECT_API_URL is that of the
server. Running it again replaces the address. `deploy/servers up` runs it if VITPRUNE_WEBHOOK is set.
"""

import os
import sys

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import EventTrigger, Posture

BLOCK = "vitprune-webhook"
NAME = "vitprune: notify of failed and crashed runs"
MESSAGE = 'flow.name ~ " " ~ flow_run.name ~ " is " ~ flow_run.state.name ~ ": " ~ flow_run.state.message'


def main() -> None:
    """Store the address; create the automation unless it exists."""
    address = os.environ.get("VITPRUNE_WEBHOOK", "")
    if not address.startswith(("http://", "https://")) or not os.environ.get("PREFECT_API_URL"):
        sys.exit("Error: set VITPRUNE_WEBHOOK to the webhook's address and PREFECT_API_URL to the server's")
    webhook = Webhook(url=address, headers={"Content-Type": "application/json"})
    block = webhook.save(BLOCK, overwrite=True)
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(NAME):
            return
    Automation(
        name=NAME,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block, payload=f'{{"text": {{{{ ({MESSAGE}) | tojson }}}}}}')],
    ).create()


if __name__ == "__main__":
    main()
