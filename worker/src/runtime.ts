/**
 * The one object: owns the one container. It starts it, waits until it listens, passes requests on, and keeps it alive or
 * lets it sleep. What it knows is in memory or in the container itself: after a reset it finds a running container and
 * goes on with it, so nothing about the container is stored and nothing stored can be wrong.
 */
import { DurableObject } from "cloudflare:workers";
import { failure, log } from "./answers";

export interface Bindings {
  RUNTIME: DurableObjectNamespace<Runtime>;
  RUNTIME_SERVICE_TOKEN?: string;
  RUNTIME_LIFECYCLE?: string;
}
/** What is used of `ctx.container`: the seam that tests put theirs behind. */
export type Box = Pick<Container, "running" | "start" | "monitor" | "signal" | "getTcpPort">;

/** The supervisor listens within milliseconds; what takes time is the platform: 7 s at the 95th percentile. */
const START_LIMIT = 30_000;
const PROBE_LIMIT = 1_000;
const PROBE_PAUSE = 100;
/** An idle object is evicted after 70 s at the earliest, and what is evicted watches nothing. */
const TICK = 30_000;
const BACKOFF = 500;
const BACKOFF_LIMIT = 300_000;
/** A container that has lived this long was no failed start: its end is forgiven. */
const STABLE = 60_000;
/** From SIGTERM to the next one, which cuts the final snapshot short: the platform's own patience. */
const STOP_LIMIT = 900_000;

const now = () => Date.now();
/** After how many idle milliseconds the container sleeps: 0 is never (`always`), NaN is what makes no sense. */
function idleLimit(lifecycle = "always"): number {
  const [, count, unit] = lifecycle.match(/^sleep-after=([1-9]\d*)([smh])$/) ?? [];
  return lifecycle === "always" ? 0 : Number(count) * { s: 1e3, m: 6e4, h: 36e5 }[unit as "s" | "m" | "h"];
}

export class Runtime extends DurableObject<Bindings> {
  readonly #box;
  readonly #idleLimit;
  /** The start that is under way or has succeeded; gone when the container is, or may be. */
  #up: Promise<void> | undefined;
  #used = 0;
  #requests = 0;
  /** Why the last container ended (nothing: cleanly), how many did so too soon in a row, and when the next may start. */
  #error: unknown;
  #failures = 0;
  #notBefore = 0;

  constructor(ctx: DurableObjectState, env: Bindings, box = ctx.container as Box) {
    super(ctx, env);
    this.#box = box;
    this.#idleLimit = idleLimit(env.RUNTIME_LIFECYCLE);
    if (box.running) this.#watch();
  }

  override async fetch(request: Request): Promise<Response> {
    this.#requests++;
    try {
      await (this.#up ??= this.#start());
      // The container speaks plain HTTP, and a forwarded `Expect` ends in 500.
      const forwarded = new Request(request.url.replace(/^https/, "http"), request);
      forwarded.headers.delete("Expect");
      return await this.#fetch(forwarded);
    } catch (error) {
      const reason = this.#down(error);
      const seconds = Math.ceil(Math.max(this.#notBefore - now(), 1) / 1_000);
      return failure(503, "container_unavailable", `No container: ${reason}.`, { "Retry-After": `${seconds}` });
    } finally {
      this.#requests--;
      this.#used = Math.max(this.#used, now());
    }
  }

  override async alarm(): Promise<void> {
    if (!this.#idleLimit) await (this.#up ??= this.#start()).catch((error) => this.#down(error));
    else if (this.#box.running && !this.#requests && now() - this.#used >= this.#idleLimit) {
      this.#used = now() + STOP_LIMIT;
      this.#box.signal(15);
    }
    await this.#schedule();
  }

  /** For the cron trigger, which may not call `alarm`. */
  wake(): Promise<void> {
    return this.alarm();
  }

  async #start(): Promise<void> {
    const began = now();
    if (!this.#box.running) {
      if (began < this.#notBefore) throw this.#error;
      if (isNaN(this.#idleLimit)) throw Error("RUNTIME_LIFECYCLE is invalid");
      // All text bindings, secrets included; what is not text (the object's own namespace) is the Worker's.
      const env = Object.fromEntries(Object.entries(this.env).filter(([, value]) => typeof value === "string"));
      this.#watch({ env, enableInternet: true });
    }
    await this.#schedule();
    // `running` is true before the program listens. Any answer will do, with the token for the sake of the log there; it is
    // a GET and read to its end, or its connection fails the next request.
    const headers = { "X-OpenAgents-Service-Token": this.env.RUNTIME_SERVICE_TOKEN! };
    for (;;) {
      if (!this.#box.running) throw this.#error;
      if (now() > began + START_LIMIT) throw Error("nothing answers on its port");
      try {
        const probe = await this.#fetch("http://probe/v1/status", {
          headers,
          signal: AbortSignal.timeout(PROBE_LIMIT),
        });
        await probe.text();
        break;
      } catch {
        await scheduler.wait(PROBE_PAUSE);
      }
    }
    log("info", "up", { ms: now() - began });
  }

  async #fetch(input: RequestInfo, init?: RequestInit): Promise<Response> {
    return this.#box.getTcpPort(8080).fetch(input, init);
  }

  /** Starts the container, or takes over one that runs, and sees to what follows its end. */
  async #watch(start?: ContainerStartupOptions): Promise<void> {
    const since = (this.#used = now());
    try {
      if (start) this.#box.start(start);
      this.#error = await this.#box.monitor();
    } catch (error) {
      this.#error = error;
    }
    const ended = now();
    this.#failures = ended - since > STABLE ? 0 : this.#failures + 1;
    this.#notBefore = ended + Math.min(BACKOFF * 2 ** this.#failures, BACKOFF_LIMIT);
    this.#down(this.#error);
    await this.#schedule();
  }

  /** The next alarm; none for a container that is asleep. */
  #schedule(): Promise<void> {
    const { storage } = this.ctx;
    if (this.#idleLimit && !this.#box.running) return storage.deleteAlarm();
    return storage.setAlarm(this.#notBefore > now() ? this.#notBefore : now() + TICK);
  }

  /** Says why: one line, no stack, and no value of a setting, should the platform ever quote one. */
  #down(error: any = Error("it has ended")): string {
    this.#up = undefined;
    let reason = `${error.message}`.split(/\.?(\n|$)/)[0]!;
    for (const value of Object.values(this.env)) if (value.length > 7) reason = reason.replaceAll(value, "[redacted]");
    log("warn", "down", { reason });
    return reason;
  }
}
