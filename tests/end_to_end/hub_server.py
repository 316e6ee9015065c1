"""What of the Hugging Face hub an upload talks to."""

import base64
import json
import re

from tests.end_to_end.json_server import JSONServer


class Hub(JSONServer):
    """Takes repositories and commits of small files; ``repos`` is {name: (private, {path: content})}."""

    def __init__(self):
        super().__init__()
        self.repos = {}

    def respond(self, path, body):
        if not body:
            return 200, {"siblings": [], "sha": "0", "id": "x/y"}
        if self.refuses:
            return 403, {"error": "no write access"}
        if path == "/api/repos/create":
            question = json.loads(body)
            name = f"{question['organization']}/{question['name']}"
            self.repos[name] = (question.get("visibility") == "private" or bool(question.get("private")), {})
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        name = re.fullmatch(r"/api/models/(.*)/commit/main", path)[1]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repos[name][1][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/0", "commitOid": "0", "success": True}
