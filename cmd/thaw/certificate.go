package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/certificate"
)

func newCertificate() *cobra.Command {
	return group("certificate", "Make the certificates with which stores and nodes know each other",
		certificateAuthority(), certificateIssue())
}

func certificateAuthority() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "authority",
		Short: "Make the authority that signs the certificates of stores and nodes",
		Long: `Make the authority that signs the certificates of stores and nodes. Keep its
directory where neither stores nor nodes can read it. A site with an authority of
its own needs none of this: a node's name is its certificate's common name.`,
		Example: "  thaw certificate authority --out /root/thaw-ca",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usage{fmt.Errorf("--out is required: the directory to make the authority in")}
			}
			files, err := certificate.NewAuthority(out, time.Now())
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n", files.Certificate, files.Key)
			return nil
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "directory to make")
	return cmd
}

func certificateIssue() *cobra.Command {
	var ca, out string
	var issue certificate.Issue
	cmd := &cobra.Command{
		Use:   "issue",
		Short: "Make a key and a certificate for a store or a node",
		Long: `Make a key and a certificate for a store or a node. A store needs --address, once for
each IP address and DNS name by which nodes reach it.`,
		Example: `  thaw certificate issue --ca /root/thaw-ca --node store-1 --address 10.0.0.1 --out store-1
  thaw certificate issue --ca /root/thaw-ca --node node-1 --out node-1`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ca == "" || out == "" || issue.Node == "" {
				return usage{fmt.Errorf("--ca, --node and --out are required: see '%s --help'", cmd.CommandPath())}
			}
			files, err := certificate.New(ca, out, issue, time.Now())
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n%s\n", files.Certificate, files.Key, files.CA)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&ca, "ca", "", "directory of the authority")
	f.StringVar(&out, "out", "", "directory for the files")
	f.StringVar(&issue.Node, "node", "", "name of the machine")
	f.StringArrayVar(&issue.Addresses, "address", nil, "IP address or DNS name of a store, may be repeated")
	f.IntVar(&issue.Days, "days", certificate.DefaultDays, "days until the certificate expires")
	return cmd
}
