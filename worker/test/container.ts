/** A container that does what the test says. There is one: like a real one, it outlives the object that watches it. */
import type { Box } from "../src/runtime";

class FakeContainer implements Box {
  running = false;
  /** Text bindings that only this test has. */
  settings: Record<string, string> = {};
  starts: ContainerStartupOptions[] = [];
  signals: number[] = [];
  monitors = 0;
  probes: Request[] = [];
  /** Requests that are not probes. */
  requests: Request[] = [];
  /** What start, a probe and a request do. */
  onStart = (): void => {};
  onProbe = (): void => {};
  onRequest = (_request: Request): Response | Promise<Response> => Response.json({ ok: true, data: {} });
  #end = (_error?: Error): void => {};

  start(options?: ContainerStartupOptions): void {
    this.starts.push(options!);
    this.onStart();
    this.running = true;
  }

  monitor(): Promise<void> {
    this.monitors++;
    return new Promise((resolve, reject) => (this.#end = (error) => (error ? reject(error) : resolve())));
  }

  /** It ends: cleanly, or with the error. */
  end(error?: Error): void {
    this.running = false;
    this.#end(error);
  }

  signal(number: number): void {
    this.signals.push(number);
  }

  getTcpPort(port: number): Fetcher {
    if (port !== 8080 || !this.running) throw new Error("connect(): Connection refused");
    const fetch = async (input: RequestInfo, init?: RequestInit) => {
      const request = new Request(input, init);
      if (new URL(request.url).host !== "probe") return (this.requests.push(request), this.onRequest(request));
      this.probes.push(request);
      this.onProbe();
      return new Response("{}");
    };
    return { fetch } as unknown as Fetcher;
  }
}

export let container = new FakeContainer();
export const newContainer = (): FakeContainer => (container = new FakeContainer());
