package daemon

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"

	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/attacher"
	"github.com/thaw-project/thaw/attacher/backend/spdk"
)

// bridged is a backend with its connection to the bridge.
type bridged struct {
	*spdk.Backend
	conn *grpc.ClientConn
}

func (b bridged) Close() error { return errors.Join(b.Backend.Close(), b.conn.Close()) }

// openSPDK reaches the lvstore through the bridge. It is made only for a store that never
// had one, which is one without the attacher's database: later, one that is not there is
// one that could not be loaded.
func openSPDK(ctx context.Context, config Config, create bool, logger *slog.Logger) (storage, error) {
	o := config.Pool.SPDK
	_, err := os.Stat(config.Paths().AttacherDB)
	first := errors.Is(err, fs.ErrNotExist)
	conn, err := dialPeer(PeerConfig{Address: o.Bridge, Certificate: o.Certificate, Key: o.Key, CA: o.CA})
	if err != nil {
		return storage{}, err
	}
	logger.Info("opening the target's lvstore", "bridge", o.Bridge, "lvstore", o.Lvstore)
	wait, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	b, err := spdk.New(wait, spdk.Options{
		Conn: conn, LvStore: o.Lvstore, AIO: o.AIO, Portals: o.Portals, Own: o.Own, Logger: logger,
		Create: create && first && o.AIO != "", ClusterBytes: int64(config.Pool.Cluster),
	})
	if err != nil {
		return storage{}, errors.Join(err, conn.Close())
	}
	s := storage{Backend: bridged{b, conn}}
	if e := b.Exporter(); e != nil {
		s.export = func() (attacher.Exporter, error) { return e, nil }
	}
	return s, nil
}
