import { abortAllDurableObjects, env, runDurableObjectAlarm, runInDurableObject, SELF } from "cloudflare:test";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import worker from "../src/index";
import type { Bindings } from "../src/runtime";
import { container, newContainer } from "./container";
import { TOKEN } from "./token";

const SECOND = 1_000;
const MINUTE = 60 * SECOND;
const bindings = env as unknown as Bindings;
const object = () => bindings.RUNTIME.getByName("runtime");

// Time is the test's own, and lies ahead, so that no alarm rings by itself. Waiting only moves it on.
let time = 0;
let logs: Record<string, unknown>[] = [];
const pass = (ms: number) => (time += ms);
const wait = scheduler.wait.bind(scheduler);
function request(path = "/v1/status", init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${TOKEN}`);
  return SELF.fetch(`https://worker.example${path}`, { ...init, headers });
}
/** The container ends, and what follows from that follows. Within the object: its promises belong to it. */
async function end(error?: Error): Promise<void> {
  await runInDurableObject(object(), async () => {
    container.end(error);
    await wait(5);
  });
}
/** Milliseconds until the next alarm, or null when none is set. */
async function alarmIn(): Promise<number | null> {
  const at = await runInDurableObject(object(), (_, state) => state.storage.getAlarm());
  return at === null ? null : at - time;
}
/** Moves time to the next alarm and rings it. */
async function ring(): Promise<void> {
  pass((await alarmIn())!);
  expect(await runDurableObjectAlarm(object())).toBe(true);
}
async function expectUnavailable(response: Response): Promise<{ reason: string; retryAfter: number }> {
  expect(response.status).toBe(503);
  const body = await response.json<{ error: string }>();
  expect(body).toEqual({
    ok: false,
    error: expect.stringMatching(/^No container: [^\n]+\.$/),
    code: "container_unavailable",
  });
  const retryAfter = Number(response.headers.get("Retry-After"));
  expect(retryAfter).toBeGreaterThanOrEqual(1);
  return { reason: body.error, retryAfter };
}
/** As after a deployment: the object is gone, the container is not. */
const reset = () => abortAllDurableObjects();

beforeEach(async () => {
  newContainer();
  await runInDurableObject(object(), (_, state) => state.storage.deleteAlarm());
  await reset();
  logs = [];
  time = Date.now() + 24 * 60 * MINUTE;
  vi.spyOn(Date, "now").mockImplementation(() => time);
  // Only the pause between probes: the test runner waits too.
  vi.spyOn(scheduler, "wait").mockImplementation((ms) => (ms === 100 ? wait(pass(ms) * 0) : wait(ms)));
  vi.spyOn(console, "log").mockImplementation((line) => void logs.push(JSON.parse(line)));
});
afterEach(() => vi.restoreAllMocks());

describe("starting", () => {
  it("gives the container all text bindings, nothing else, and the internet", async () => {
    expect((await request()).status).toBe(200);
    const expected = { RUNTIME_SERVICE_TOKEN: TOKEN, RUNTIME_INSTANCE_ID: "ada", PROVIDER_KEY: "sk-provider-key" };
    const [{ env: given = {}, ...rest }] = container.starts as [ContainerStartupOptions];
    expect(rest).toEqual({ enableInternet: true });
    // The test runner has a binding of its own.
    expect(Object.fromEntries(Object.entries(given).filter(([name]) => !name.startsWith("__VITEST")))).toEqual(
      expected,
    );
  });

  it("waits until something listens, then passes the request on", async () => {
    container.onProbe = () => {
      if (container.probes.length < 20) throw new Error("connect(): Connection refused");
      expect(container.requests).toEqual([]);
    };
    expect((await request()).status).toBe(200);
    expect(container.probes).toHaveLength(20);
    expect(container.requests).toHaveLength(1);
  });

  it("gives each probe one second, and is done probing once there was an answer", async () => {
    const limits: number[] = [];
    vi.spyOn(AbortSignal, "timeout").mockImplementation((ms) => (limits.push(ms), new AbortController().signal));
    container.onProbe = () => {
      pass(SECOND);
      if (limits.length < 3) throw new DOMException("timed out", "TimeoutError");
    };
    await request();
    await request();
    expect(limits).toEqual([SECOND, SECOND, SECOND]);
  });

  it("is given up in bounded time when nothing ever listens, and tried again by the next request", async () => {
    const began = time;
    container.onProbe = () => {
      pass(SECOND);
      throw new DOMException("timed out", "TimeoutError");
    };
    await expectUnavailable(await request());
    expect(time - began).toBeLessThanOrEqual(33 * SECOND);
    container.onProbe = () => {};
    expect((await request()).status).toBe(200);
    expect(container.starts).toHaveLength(1);
  });

  it("is shared by requests that come at once", async () => {
    const answers = await Promise.all([request(), request(), request("/v1/devices")]);
    expect(answers.map((answer) => answer.status)).toEqual([200, 200, 200]);
    expect(container.starts).toHaveLength(1);
    expect(container.monitors).toBe(1);
  });

  it("that the platform refuses is 503 with its reason, without stack or secret, and backs off", async () => {
    container.onStart = () => {
      throw new Error(`no instance available (${TOKEN}, sk-provider-key).\n    at start (worker.js:1:1)`);
    };
    const first = await expectUnavailable(await request());
    expect(first.reason).toBe("No container: no instance available ([redacted], [redacted]).");
    await request();
    expect(container.starts).toHaveLength(1);
    for (const line of logs) expect(JSON.stringify(line)).not.toMatch(/sk-provider-key|0123456789abcdef|worker\.js/);
    pass(MINUTE);
    container.onStart = () => {};
    expect((await request()).status).toBe(200);
  });

  it("that ends at once is 503 with its exit code", async () => {
    container.onProbe = () => {
      container.end(new Error("Container exited with unexpected exit code: 64"));
      throw new Error("connect(): Connection refused");
    };
    const { reason } = await expectUnavailable(await request());
    expect(reason).toContain("exit code: 64");
  });

  it.each(["never", "sleep-after=", "sleep-after=0s", "sleep-after=5", "sleep-after=-5m", "sleep-after=5m "])(
    "does not happen with RUNTIME_LIFECYCLE=%j",
    async (lifecycle) => {
      container.settings = { RUNTIME_LIFECYCLE: lifecycle };
      expect((await expectUnavailable(await request())).reason).toContain("RUNTIME_LIFECYCLE");
      expect(container.starts).toEqual([]);
    },
  );
});

describe("passing on", () => {
  it("leaves method, path, query, headers and body of the request as they are, but for Expect", async () => {
    const body = "x".repeat(100_000);
    const headers = { "X-Request-Id": "7", Expect: "100-continue", "Content-Type": "text/plain" };
    container.onRequest = async (got) => new Response(await got.text());
    const response = await request("/v1/devices/a%3Ab/approve?x=1&y=%20", { method: "POST", headers, body });
    expect(await response.text()).toBe(body);
    const [got] = container.requests;
    expect(got!.method).toBe("POST");
    expect(got!.url).toBe("http://worker.example/v1/devices/a%3Ab/approve?x=1&y=%20");
    expect(got!.headers.get("X-Request-Id")).toBe("7");
    expect(got!.headers.get("Content-Type")).toBe("text/plain");
    expect(got!.headers.get("Authorization")).toBe(`Bearer ${TOKEN}`);
    expect(got!.headers.has("Expect")).toBe(false);
  });

  it.each([202, 302, 401, 409, 500, 503])("leaves the answer as it is: %d", async (status) => {
    const headers = { "Retry-After": "30", "X-Own": "yes", Location: "/elsewhere" };
    container.onRequest = () => new Response('{"ok":false}', { status, headers });
    const response = await request("/v1/backup", { method: "POST", redirect: "manual" });
    expect(response.status).toBe(status);
    expect(response.headers.get("X-Own")).toBe("yes");
    expect(response.headers.get("Retry-After")).toBe("30");
    expect(await response.text()).toBe('{"ok":false}');
  });

  it("streams the answer: its beginning is there before its end", async () => {
    let isRead = false;
    const body = () =>
      new ReadableStream({
        async start(controller) {
          controller.enqueue(new TextEncoder().encode("one"));
          while (!isRead) await wait(1);
          controller.enqueue(new TextEncoder().encode("two"));
          controller.close();
        },
      });
    container.onRequest = () => new Response(body());
    const reader = (await request()).body!.getReader();
    expect(new TextDecoder().decode((await reader.read()).value)).toBe("one");
    isRead = true;
    expect(new TextDecoder().decode((await reader.read()).value)).toBe("two");
    expect((await reader.read()).done).toBe(true);
  });

  it("is 503 when the container is lost meanwhile, and probes before the next one", async () => {
    await request();
    container.onRequest = () => Promise.reject(new Error("Network connection lost."));
    await expectUnavailable(await request());
    container.onRequest = () => new Response("back");
    expect(await (await request()).text()).toBe("back");
    expect(container.probes).toHaveLength(2);
    expect(container.starts).toHaveLength(1);
  });
});

describe("lifecycle always", () => {
  it("looks every 30 seconds", async () => {
    await request();
    for (let i = 0; i < 3; i++) {
      expect(await alarmIn()).toBe(30 * SECOND);
      await ring();
    }
    expect(container.starts).toHaveLength(1);
    expect(container.signals).toEqual([]);
  });

  it("restarts a container that ended after a long life within a second, without a request", async () => {
    await request();
    pass(2 * MINUTE);
    await end(new Error("Container exited with unexpected exit code: 137"));
    expect(await alarmIn()).toBeLessThanOrEqual(SECOND);
    await ring();
    expect(container.starts).toHaveLength(2);
    expect(await alarmIn()).toBe(30 * SECOND);
  });

  it("restarts one that keeps ending after delays that double up to five minutes", async () => {
    await request();
    const delays: number[] = [];
    for (let i = 0; i < 12; i++) {
      await end(new Error("Container exited with unexpected exit code: 1"));
      delays.push((await alarmIn())!);
      await ring();
    }
    expect(delays.slice(0, 5)).toEqual([1, 2, 4, 8, 16].map((seconds) => seconds * SECOND));
    expect(delays.at(-1)).toBe(5 * MINUTE);
    expect(container.starts).toHaveLength(13);
    pass(2 * MINUTE);
    await end();
    expect(await alarmIn()).toBeLessThanOrEqual(SECOND);
  });

  it("answers 503 with the reason and the time to wait while it backs off", async () => {
    await request();
    for (let i = 0; i < 5; i++) {
      await end(new Error("Container exited with unexpected exit code: 64"));
      if (i < 4) await ring();
    }
    const { reason, retryAfter } = await expectUnavailable(await request());
    expect(reason).toContain("exit code: 64");
    expect(retryAfter).toBe(16);
    expect(container.starts).toHaveLength(5);
  });

  it("goes on ringing while it cannot start", async () => {
    await request();
    await end();
    container.onStart = () => {
      throw new Error("no instance available");
    };
    for (let i = 0; i < 4; i++) {
      await ring();
      expect(await alarmIn()).toBeGreaterThan(0);
    }
  });

  it("is woken by the cron trigger when it is gone", async () => {
    await worker.scheduled({} as ScheduledController, bindings);
    expect(container.starts).toHaveLength(1);
    expect(await alarmIn()).toBe(30 * SECOND);
  });
});

describe("lifecycle sleep-after", () => {
  beforeEach(async () => {
    container.settings = { RUNTIME_LIFECYCLE: "sleep-after=5m" };
    await request();
  });

  /** Rings alarms until the container is told to stop; says how long that took. */
  async function untilSignal(): Promise<number> {
    const began = time;
    while (!container.signals.length && time - began < 60 * MINUTE) await ring();
    return time - began;
  }

  it("asks the container to stop after that long without a request, once", async () => {
    expect(await untilSignal()).toBe(5 * MINUTE);
    for (let i = 0; i < 10; i++) await ring();
    expect(container.signals).toEqual([15]);
  });

  it("counts from the last request", async () => {
    for (let i = 0; i < 8; i++) await ring();
    await request();
    expect(await untilSignal()).toBe(5 * MINUTE);
  });

  it("does not count a request that is still under way as idle", async () => {
    let isDone = false;
    container.onRequest = async () => {
      while (!isDone) await wait(1);
      return new Response("done");
    };
    const pending = request("/v1/backup", { method: "POST" });
    await vi.waitFor(() => expect(container.requests).toHaveLength(2));
    for (let i = 0; i < 20; i++) await ring();
    expect(container.signals).toEqual([]);
    isDone = true;
    await pending;
    expect(await untilSignal()).toBe(5 * MINUTE);
  });

  it("lets a request end in the container when its client has gone, and counts from then", async () => {
    let release = (_: Response): void => {};
    container.onRequest = () => new Promise((resolve) => (release = resolve));
    const client = new AbortController();
    const pending = request("/v1/backup", { method: "POST", signal: client.signal });
    await vi.waitFor(() => expect(container.requests).toHaveLength(2));
    client.abort();
    await expect(pending).rejects.toThrow("aborted");
    for (let i = 0; i < 20; i++) await ring();
    expect(container.requests[1]!.signal.aborted).toBe(false);
    expect(container.signals).toEqual([]);
    await runInDurableObject(object(), async () => {
      release(new Response("done"));
      await wait(5);
    });
    expect(await untilSignal()).toBe(5 * MINUTE);
  });

  it("sets no alarm once the container is stopped, and does not wake it by cron", async () => {
    await untilSignal();
    await end();
    expect(await alarmIn()).toBeNull();
    await worker.scheduled({} as ScheduledController, bindings);
    expect(container.starts).toHaveLength(1);
    expect(await alarmIn()).toBeNull();
  });

  it("starts it again with the next request", async () => {
    await untilSignal();
    await end();
    pass(SECOND);
    expect((await request()).status).toBe(200);
    expect(container.starts).toHaveLength(2);
    container.signals = [];
    expect(await untilSignal()).toBe(5 * MINUTE);
  });

  it("sets no alarm after a crash either", async () => {
    await end(new Error("Container exited with unexpected exit code: 1"));
    expect(await alarmIn()).toBeNull();
  });

  it.each([
    ["90s", 90 * SECOND],
    ["2h", 120 * MINUTE],
  ])("understands %s", async (duration, ms) => {
    container.settings = { RUNTIME_LIFECYCLE: `sleep-after=${duration}` };
    await reset();
    await request();
    pass(ms - SECOND);
    await runDurableObjectAlarm(object());
    expect(container.signals).toEqual([]);
    pass(SECOND);
    await runDurableObjectAlarm(object());
    expect(container.signals).toEqual([15]);
  });
});

describe("after a reset of the object", () => {
  it("goes on with the container that runs, and watches it", async () => {
    await request();
    await reset();
    expect((await request()).status).toBe(200);
    expect(container.starts).toHaveLength(1);
    expect(container.monitors).toBe(2);
    pass(2 * MINUTE);
    await end();
    await ring();
    expect(container.starts).toHaveLength(2);
  });

  it("finds its alarm again, and stores nothing else", async () => {
    await request();
    await reset();
    expect(await alarmIn()).toBe(30 * SECOND);
    const stored = await runInDurableObject(object(), async (_, state) => [...(await state.storage.list())]);
    expect(stored).toEqual([]);
  });

  it("starts a container that ended meanwhile", async () => {
    await request();
    container.running = false;
    await reset();
    await ring();
    expect(container.starts).toHaveLength(2);
    expect(await alarmIn()).toBe(30 * SECOND);
  });
});

it("logs one object per line, with time, level and message", async () => {
  await request();
  await end(new Error("Container exited with unexpected exit code: 1"));
  expect(logs).toEqual([
    { ts: expect.any(String), level: "info", msg: "up", ms: 0 },
    { ts: expect.any(String), level: "warn", msg: "down", reason: "Container exited with unexpected exit code: 1" },
  ]);
});
