import { env, SELF } from "cloudflare:test";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import worker from "../src/index";
import type { Bindings } from "../src/runtime";
import { container, newContainer } from "./container";
import { TOKEN } from "./token";

const URL = "https://worker.example/v1/status";
const get = (headers: Record<string, string>, url = URL, method = "GET") => SELF.fetch(url, { method, headers });
const bearer = { Authorization: `Bearer ${TOKEN}` };
const plain = { "X-OpenAgents-Service-Token": TOKEN };

async function expectError(response: Response, status: number, code: string): Promise<void> {
  expect(response.status).toBe(status);
  expect(await response.json()).toEqual({ ok: false, error: expect.stringMatching(/^[A-Z].*\.$/), code });
}

beforeEach(() => {
  newContainer();
  vi.spyOn(console, "log").mockImplementation(() => {});
});
afterEach(() => vi.restoreAllMocks());

describe("the service token", () => {
  it.each([
    ["Authorization", bearer],
    ["Authorization, whatever the scheme's case", { Authorization: `bearer ${TOKEN}` }],
    ["X-OpenAgents-Service-Token", plain],
    ["one of two: the first", { ...bearer, "X-OpenAgents-Service-Token": "wrong" }],
    ["one of two: the second", { ...plain, Authorization: "Bearer wrong" }],
  ])("is taken from %s", async (_, headers) => {
    expect((await get(headers)).status).toBe(200);
  });

  it.each<[string, Record<string, string>]>([
    ["none", {}],
    ["a wrong one", { Authorization: `Bearer ${TOKEN.replace("0", "1")}` }],
    ["a wrong plain one", { "X-OpenAgents-Service-Token": TOKEN.replace("0", "1") }],
    ["a shorter one", { "X-OpenAgents-Service-Token": TOKEN.slice(1) }],
    ["a longer one", { Authorization: `Bearer ${TOKEN}0` }],
    ["an empty one", { Authorization: "Bearer ", "X-OpenAgents-Service-Token": "" }],
    ["no scheme", { Authorization: TOKEN }],
    ["another scheme", { Authorization: `Basic ${TOKEN}` }],
    ["two spaces", { Authorization: `Bearer  ${TOKEN}` }],
    ["another header", { Cookie: TOKEN }],
  ])("is not %s", async (_, headers) => {
    await expectError(await get(headers), 401, "unauthorized");
    expect(container.starts).toEqual([]);
  });

  it("is asked for whatever the path and the method", async () => {
    for (const path of ["/", "/v1/status", "/v2", "/v1", "/favicon.ico"]) {
      for (const method of ["GET", "POST", "DELETE", "OPTIONS"]) {
        await expectError(await get({}, `https://worker.example${path}`, method), 401, "unauthorized");
      }
    }
  });

  it.each([undefined, "", "short", TOKEN.slice(1), `${TOKEN} x`, `${TOKEN}\n`, "a".repeat(513)])(
    "when configured as %j serves nothing, not even to those who know it",
    async (token) => {
      const bad = { ...env, RUNTIME_SERVICE_TOKEN: token } as unknown as Bindings;
      const headers = { "X-OpenAgents-Service-Token": (token ?? "").trim() };
      for (const url of [URL, "https://worker.example/"]) {
        const request = new Request(url, { headers }) as Parameters<typeof worker.fetch>[0];
        await expectError(await worker.fetch(request, bad), 500, "misconfigured");
      }
      await worker.scheduled({} as ScheduledController, bad);
      expect(container.starts).toEqual([]);
    },
  );
});

describe("paths", () => {
  it.each(["/", "/v1", "/v2/status", "//v1/status", "/v1/../metrics", "/v1/%2e%2e/metrics", "/V1/status"])(
    "%s is not found",
    async (path) => {
      await expectError(await get(bearer, `https://worker.example${path}`), 404, "not_found");
      expect(container.starts).toEqual([]);
    },
  );
});
