package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"syscall"

	"github.com/thaw-project/thaw/kind"
)

// maxAnswerBytes bounds what Call reads, and about what a batch is answered with: SPDK
// sends at most 32 MiB.
const maxAnswerBytes = 32 << 20

// Call sends one request to the server at the socket and returns the result. An answer
// that is an error comes back as *Error; nobody listening is kind.Unavailable.
func Call(ctx context.Context, socket, method string, params json.RawMessage) (json.RawMessage, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, kind.Errorf(kind.Unavailable, "nobody listens on %s: start 'thaw target', or name its --socket", socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, kind.Errorf(kind.Denied, "connect to %s: permission denied: run as root", socket)
	case err != nil:
		return nil, kind.Errorf(kind.Unavailable, "connect to %s: %w", socket, err)
	}
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	request := struct {
		JSONRPC string          `json:"jsonrpc"`
		ID      int             `json:"id"`
		Method  string          `json:"method"`
		Params  json.RawMessage `json:"params,omitempty"`
	}{"2.0", 1, method, params}
	if err := json.NewEncoder(nc).Encode(request); err != nil {
		return nil, broken(ctx, socket, method, err)
	}
	var answer struct {
		Result json.RawMessage `json:"result"`
		Error  *Error          `json:"error"`
	}
	if err := json.NewDecoder(io.LimitReader(nc, maxAnswerBytes)).Decode(&answer); err != nil {
		return nil, broken(ctx, socket, method, err)
	}
	if answer.Error != nil {
		return nil, answer.Error
	}
	return answer.Result, nil
}

func broken(ctx context.Context, socket, method string, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return kind.Wrap(kind.Unavailable, fmt.Errorf("call %s on %s: %w", method, socket, err))
}
