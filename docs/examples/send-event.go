// Tell meterd what was used, from Go, with nothing but its standard library (Go 1.19 or newer).
//
//	go run send-event.go ID [AGREEMENT]
//
// ID names the piece of work, and every event's id is made of it. That is what makes an event count once: send the
// same ids again, as often as you like, and they are duplicates. So take an id that your work has already.
//
// METERD_URL is where meterd listens (http://127.0.0.1:8787). METERD_TOKEN is a token with the scope "ingest", where
// meterd wants one.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"strconv"
	"time"
)

// An Event says who used how much of what. A quantity is a text here: then no float ever touches it.
type Event struct {
	ID         string            `json:"id"`
	Agreement  string            `json:"agreement"`
	Meter      string            `json:"meter"`
	Quantity   string            `json:"quantity"`
	Dimensions map[string]string `json:"dimensions,omitempty"`
}

// A Result says what became of the events of one request.
type Result struct {
	Accepted   int         `json:"accepted"`
	Duplicates int         `json:"duplicates"`
	Rejected   []Rejection `json:"rejected"`
}

// A Rejection says why an event was not counted. meterd keeps it until a person has repaired that.
type Rejection struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
	Detail string `json:"detail"`
}

// A restart or a full disk takes minutes; then a person should look.
const patience = 5 * time.Minute

var client = &http.Client{Timeout: 10 * time.Second}

// send sends events until meterd has them.
//
// 200 comes after the commit. No answer, 429 or 5xx says nothing, so the same events are sent again: those that had
// arrived are duplicates then. Any other status is a mistake in the request; sending it again would not help.
func send(url, token string, events []Event) (Result, error) {
	body, err := json.Marshal(events) // Made once: the same ids in every try.
	if err != nil {
		return Result{}, err
	}
	giveUp := time.Now().Add(patience)
	for wait := 200 * time.Millisecond; ; wait = shorter(2*wait, 15*time.Second) {
		status, header, text, err := post(url, token, body)
		switch {
		case err == nil && status == http.StatusOK:
			var result Result
			err = json.Unmarshal(text, &result)
			return result, err
		case err == nil && status != http.StatusTooManyRequests && status < 500:
			return Result{}, fmt.Errorf("meterd refused the request: %s", text)
		case time.Now().After(giveUp):
			return Result{}, fmt.Errorf("meterd has not taken the events within %v (%v)", patience, err)
		}
		pause := time.Duration(float64(wait) * (0.5 + rand.Float64()))
		if asked, err := strconv.Atoi(header.Get("Retry-After")); err == nil && asked > 0 {
			pause = shorter(time.Duration(asked)*time.Second, time.Minute)
		}
		time.Sleep(pause)
	}
}

// post makes one request.
func post(url, token string, body []byte) (int, http.Header, []byte, error) {
	request, err := http.NewRequest(http.MethodPost, url+"/v1/events", bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	answer, err := client.Do(request)
	if err != nil {
		return 0, nil, nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, answer.Header, text, err
}

func shorter(one, other time.Duration) time.Duration {
	if one < other {
		return one
	}
	return other
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: go run send-event.go ID [AGREEMENT]")
		os.Exit(2)
	}
	id, agreement, url := os.Args[1], "customer-1", os.Getenv("METERD_URL")
	if len(os.Args) > 2 {
		agreement = os.Args[2]
	}
	if url == "" {
		url = "http://127.0.0.1:8787"
	}
	rand.Seed(time.Now().UnixNano()) // For the pauses alone.
	result, err := send(url, os.Getenv("METERD_TOKEN"), []Event{
		{ID: id + "-1", Agreement: agreement, Meter: "tokens", Quantity: "80", Dimensions: map[string]string{"kind": "output"}},
		{ID: id + "-2", Agreement: agreement, Meter: "tokens", Quantity: "0.000000001"},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%d accepted, %d duplicates, %d rejected\n", result.Accepted, result.Duplicates, len(result.Rejected))
	for _, rejection := range result.Rejected {
		fmt.Fprintf(os.Stderr, "%s: %s: %s\n", rejection.ID, rejection.Reason, rejection.Detail)
	}
	if len(result.Rejected) > 0 {
		os.Exit(1)
	}
}
