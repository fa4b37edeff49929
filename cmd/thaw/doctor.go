package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/doctor"
	"github.com/thaw-project/thaw/kind"
)

func newDoctor() *cobra.Command {
	var where place
	var out output
	var containerd, snapshotter string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check kernel, containerd and permissions, and say what to do",
		Example: `  thaw doctor
  thaw doctor --containerd /run/k3s/containerd/containerd.sock --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := where.load()
			if err != nil {
				return err
			}
			if containerd, err = filepath.Abs(containerd); err != nil {
				return err
			}
			p := config.Paths()
			var presentations map[string]error
			var details map[string]string
			if config.Store() || config.Images() && config.ImagesPart.Mode == daemon.ImagesHost {
				presentations, details = daemon.ProbePresentations(cmd.Context())
			}
			findings := doctor.Examine(cmd.Context(), doctor.Options{
				Root: config.Root, Run: config.Run, MetricsSockets: processes(config), SnapshotterSocket: p.SnapshotterSocket,
				ContainerdSocket: containerd, Snapshotter: snapshotter,
				Presentations: presentations, PresentationDetails: details, Force: config.Presentation.Force(),
			})
			for _, r := range config.Remote {
				findings = append(findings, remoteStore(cmd.Context(), config.NodeName, r))
			}
			err = out.print(cmd.OutOrStdout(), findings, func(w *tabwriter.Writer) {
				for _, f := range findings {
					row(w, f.State, f.Check, f.Detail)
					if f.Advice != "" {
						row(w, "", "", "-> "+f.Advice)
					}
				}
			})
			if err != nil {
				return err
			}
			var failed []string
			for _, f := range findings {
				if f.State == doctor.Fail {
					failed = append(failed, f.Check)
				}
			}
			if len(failed) > 0 {
				return kind.Errorf(kind.Unsupported, "%s: %s", count(len(failed), "check failed", "checks failed"), strings.Join(failed, ", "))
			}
			return nil
		},
	}
	where.register(cmd)
	out.register(cmd)
	cmd.Flags().StringVar(&containerd, "containerd", "/run/containerd/containerd.sock", "containerd's socket")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "thaw", "the snapshotter's name in containerd's configuration")
	return cmd
}

// processes are the metrics sockets of the processes that run here or should: those of
// their own where there is any, else the server's.
func processes(config daemon.Config) map[string]string {
	found := make(map[string]string)
	sockets := config.MetricsSockets()
	for p, socket := range sockets {
		if _, err := os.Stat(socket); err == nil && p != daemon.ProcessServer {
			found[string(p)] = socket
		}
	}
	if len(found) == 0 {
		found[string(daemon.ProcessServer)] = sockets[daemon.ProcessServer]
	}
	return found
}

// remoteStore tells whether the store on another machine answers.
func remoteStore(ctx context.Context, node string, r daemon.RemoteConfig) doctor.Finding {
	f := doctor.Finding{Check: "store " + r.Name, State: doctor.OK}
	attached, err := daemon.ReachRemote(ctx, node, r)
	if err != nil {
		f.State, f.Detail = doctor.Warn, err.Error()
		f.Advice = "check remote.attacher, the network, and both ends' certificates; containers that run here wait for it"
		return f
	}
	f.Detail = "at " + r.Attacher + " answers; " + count(attached, "block is attached here", "blocks are attached here")
	return f
}
