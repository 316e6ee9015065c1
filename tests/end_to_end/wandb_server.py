"""What of a Weights & Biases server a saved view talks to."""

import json

from tests.end_to_end.json_server import JSONServer


class Dashboards(JSONServer):
    """Takes views; ``views`` is {(entity, project): [view]}, each with its name and what is in it."""

    def __init__(self):
        super().__init__()
        self.views = {}

    def respond(self, path, body):
        if path != "/graphql":
            return 200, {}
        question = json.loads(body)
        if "upsertView" not in question["query"]:
            viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return 200, {"data": {"viewer": viewer}}
        if self.refuses:
            return 200, {"data": {"upsertView": None}, "errors": [{"message": "permission denied"}]}
        view = question["variables"]
        views = self.views.setdefault((view["entityName"], view["projectName"]), [])
        views.append({"name": view["displayName"], "section": json.loads(view["spec"])["section"]})
        return 200, {"data": {"upsertView": {"view": {"id": str(len(views)), "name": view["name"]}, "inserted": True}}}
