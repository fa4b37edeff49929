package daemon

import (
	"context"
	"time"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/node/remote"
)

// reachWait bounds the call that finds out whether a store answers.
const reachWait = 5 * time.Second

// ReachRemote asks a configured store something harmless, and returns how many blocks this
// node has attached there.
func ReachRemote(ctx context.Context, node string, r RemoteConfig) (attached int, err error) {
	conn, err := remote.Dial(remote.TargetOptions{Attacher: r.Attacher, Files: rpc.Files{Certificate: r.Certificate, Key: r.Key, CA: r.CA}, Node: node})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, reachWait)
	defer cancel()
	list, err := attacherv1.NewNodeClient(conn).ListAttachments(ctx, &attacherv1.ListAttachmentsRequest{})
	return len(list.GetAttachments()), err
}
