// A conversation kept in sessiond: two turns are appended, and the active context comes back within a token budget.
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sessiondv1 "example.com/resume/gen/sessiond/v1"
)

// Repeats are safe: a turn_id is minted once, and the daemon recognises it.
const serviceConfig = `{"methodConfig": [{
	"name": [{"service": "sessiond.v1.SessionService"}],
	"retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
		"retryableStatusCodes": ["UNAVAILABLE"]}}]}`

// As the daemon's own limit; gRPC's default of 4 MiB is below a large context.
const messageBytesMax = 64 << 20

func main() {
	server := os.Getenv("SESSIOND_SERVER")
	if server == "" {
		server = "127.0.0.1:7443"
	}
	if err := run(server); err != nil {
		log.Fatal(explain(err))
	}
}

func run(server string) error {
	connection, err := grpc.NewClient(server,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytesMax)))
	if err != nil {
		return err
	}
	defer connection.Close()
	sessions := sessiondv1.NewSessionServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	sessionID := mint()
	ctx = metadata.AppendToOutgoingContext(ctx, "x-session-id", sessionID)
	create := &sessiondv1.CreateSessionRequest{SessionId: sessionID, UserId: "ada"}
	if _, err := sessions.CreateSession(ctx, create); err != nil {
		return err
	}
	appended, err := sessions.AppendTurn(ctx, &sessiondv1.AppendTurnRequest{
		SessionId: sessionID,
		Turns: []*sessiondv1.TurnInput{
			turn(sessiondv1.Role_ROLE_USER, "My name is Ada."),
			turn(sessiondv1.Role_ROLE_ASSISTANT, "Hello, Ada."),
		},
	})
	if err != nil {
		return err
	}
	// Keep what lies above cloud_seq to send it again, with the same turn_ids, if the node's disk is lost.
	fmt.Printf("appended up to turn %d, cloud tier at %d\n", appended.Head.Seq, appended.CloudSeq)

	resumed, err := sessions.ResumeSession(ctx, &sessiondv1.ResumeSessionRequest{
		SessionId:    sessionID,
		HighestAcked: appended.Head,
		Context:      &sessiondv1.ContextSpec{BudgetTokens: 4000, NewMessage: text("What is my name?")},
	})
	if err != nil {
		return err
	}
	active := resumed.Context
	fmt.Printf("%s, %d tokens\n", active.Receipt.Rung, active.Tokens.Total)
	for _, item := range active.Turns {
		for _, part := range item.GetMessage().GetParts() {
			fmt.Printf("%d %s: %s\n", item.Seq, item.Role, part.GetText())
		}
	}
	if active.Receipt.Notice != "" {
		fmt.Println("tell the user:", active.Receipt.Notice)
	}
	return nil
}

func turn(role sessiondv1.Role, content string) *sessiondv1.TurnInput {
	return &sessiondv1.TurnInput{TurnId: mint(), Role: role, Body: &sessiondv1.TurnInput_Message{Message: text(content)}}
}

func text(content string) *sessiondv1.Message {
	return &sessiondv1.Message{Parts: []*sessiondv1.Part{{Kind: &sessiondv1.Part_Text{Text: content}}}}
}

// mint makes an id that nobody has used. Make it once per turn, and send the same one on every repeat.
func mint() string {
	var random [16]byte
	if _, err := rand.Read(random[:]); err != nil {
		panic(err)
	}
	return fmt.Sprintf("%x", random)
}

// explain adds the reason, as docs/errors.md lists it, and when a repeat can help.
func explain(err error) string {
	message := err.Error()
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			message += " [" + detail.Reason + "]"
		case *errdetails.RetryInfo:
			message += fmt.Sprintf(" (try again after %s)", detail.RetryDelay.AsDuration())
		}
	}
	return message
}
