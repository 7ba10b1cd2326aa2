// A conversation kept in sessiond: two turns are appended, and the active context comes back within a token budget.

import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

const PROTO = process.env.SESSIOND_PROTO ?? fileURLToPath(new URL("../../../proto", import.meta.url));
const SERVER = process.env.SESSIOND_SERVER ?? "127.0.0.1:7443";

// Repeats are safe: a turnId is minted once, and the daemon recognises it.
const RETRIES = {
  methodConfig: [
    {
      name: [{ service: "sessiond.v1.SessionService" }],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.1s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

// What this example reads of the replies; 64-bit numbers come as strings, so that none is rounded.
interface Position { epoch: number; seq: string }
interface Part { text?: string }
interface Turn { seq: string; role: string; message?: { parts: Part[] } }
interface Appended { head: Position; cloudSeq: string }
interface Resumed { context: { turns: Turn[]; tokens: { total: number }; receipt: { rung: string; notice: string } } }

const definition = protoLoader.loadSync("sessiond/v1/session.proto", {
  includeDirs: [PROTO],
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const sessiond = (grpc.loadPackageDefinition(definition) as any).sessiond.v1;
const sessions: grpc.Client = new sessiond.SessionService(SERVER, grpc.credentials.createInsecure(), {
  "grpc.service_config": JSON.stringify(RETRIES),
  // As the daemon's own limit; gRPC's default of 4 MiB is below a large context.
  "grpc.max_receive_message_length": 64 * 1024 * 1024,
});

function call<Reply>(method: string, request: { sessionId: string } & Record<string, unknown>): Promise<Reply> {
  const metadata = new grpc.Metadata();
  metadata.set("x-session-id", request.sessionId);
  return new Promise((resolve, reject) => {
    (sessions as any)[method](
      request,
      metadata,
      { deadline: Date.now() + 10_000 },
      (error: grpc.ServiceError | null, reply: Reply) => (error ? reject(error) : resolve(reply)),
    );
  });
}

const text = (content: string) => ({ parts: [{ text: content }] });
// Made once per turn: every repeat sends the same turnId.
const turn = (role: string, content: string) => ({ turnId: randomUUID(), role, message: text(content) });

async function main(): Promise<void> {
  const sessionId = randomUUID();
  await call("createSession", { sessionId, userId: "ada" });
  const appended = await call<Appended>("appendTurn", {
    sessionId,
    turns: [turn("ROLE_USER", "My name is Ada."), turn("ROLE_ASSISTANT", "Hello, Ada.")],
  });
  // Keep what lies above cloudSeq to send it again, with the same turnIds, if the node's disk is lost.
  console.log(`appended up to turn ${appended.head.seq}, cloud tier at ${appended.cloudSeq}`);

  const { context } = await call<Resumed>("resumeSession", {
    sessionId,
    highestAcked: appended.head,
    context: { budgetTokens: 4000, newMessage: text("What is my name?") },
  });
  console.log(`${context.receipt.rung}, ${context.tokens.total} tokens`);
  for (const { seq, role, message } of context.turns) {
    console.log(`${seq} ${role}: ${message?.parts.map((part) => part.text ?? "").join("") ?? ""}`);
  }
  if (context.receipt.notice) console.log(`tell the user: ${context.receipt.notice}`);
}

main()
  .catch((error: grpc.ServiceError) => {
    // The message says what to do; docs/errors.md lists every reason.
    console.error(`${grpc.status[error.code] ?? "ERROR"}: ${error.details ?? error.message}`);
    process.exitCode = 1;
  })
  .finally(() => sessions.close());
